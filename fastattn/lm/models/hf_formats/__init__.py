"""Hugging Face's formats of models, one to a file; ``convert.py`` reads and writes the files."""

from fastattn.lm.models.hf_formats.bert import BERT
from fastattn.lm.models.hf_formats.gpt2 import GPT2
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors
from fastattn.lm.models.hf_formats.llama import LLAMA
from fastattn.lm.models.hf_formats.t5 import T5
from fastattn.lm.models.hf_formats.vit import VIT

HF_FORMATS = {hf_format.model_type: hf_format for hf_format in (GPT2, BERT, LLAMA, T5, VIT)}

__all__ = ["HF_FORMATS", "HFFormat", "Json", "Tensors"]
