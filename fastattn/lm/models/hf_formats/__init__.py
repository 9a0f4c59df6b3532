"""Hugging Face's formats of models, one to a file; ``convert.py`` reads and writes the files."""

from fastattn.lm.models.hf_formats.bart import BART
from fastattn.lm.models.hf_formats.bert import BERT, DISTILBERT, ROBERTA
from fastattn.lm.models.hf_formats.gpt2 import GPT2
from fastattn.lm.models.hf_formats.hf_format import HFFormat, Json, Tensors
from fastattn.lm.models.hf_formats.llama import LLAMAS
from fastattn.lm.models.hf_formats.marian import MARIAN
from fastattn.lm.models.hf_formats.modernbert import MODERNBERT
from fastattn.lm.models.hf_formats.paligemma import PALIGEMMA
from fastattn.lm.models.hf_formats.t5 import T5
from fastattn.lm.models.hf_formats.t5gemma import T5GEMMA
from fastattn.lm.models.hf_formats.vit import VIT

# A model that several of them describe is written in the first.
_ALL = (GPT2, BERT, *LLAMAS, T5, VIT, ROBERTA, DISTILBERT, MODERNBERT, BART, MARIAN, T5GEMMA, PALIGEMMA)
HF_FORMATS = {hf_format.model_type: hf_format for hf_format in _ALL}

__all__ = ["HF_FORMATS", "HFFormat", "Json", "Tensors"]
