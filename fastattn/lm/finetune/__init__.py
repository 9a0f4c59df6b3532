"""Fine-tuning and evaluation: from labelled examples to a model for a task and its scores.

Needs ``pip install 'fastattn[eval]'``, and ``'fastattn[lora]'`` for adapters.
"""

from fastattn.lm.finetune.evaluate import Evaluation, evaluate
from fastattn.lm.finetune.run import FinetuneConfig, Finetuned, finetune, load_finetuned

__all__ = ["Evaluation", "FinetuneConfig", "Finetuned", "evaluate", "finetune", "load_finetuned"]
