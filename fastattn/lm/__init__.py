"""The bundled transformer: data, models, training, fine-tuning, generation. It imports public names alone."""
