"""Hugging Face's forms of the models, one to a file. Reading and writing files is the business of ``convert.py``."""

from fastattn.lm.models.hf_formats.bert import BERT
from fastattn.lm.models.hf_formats.form import Form, Json, Tensors
from fastattn.lm.models.hf_formats.gpt2 import GPT2
from fastattn.lm.models.hf_formats.llama import LLAMA
from fastattn.lm.models.hf_formats.t5 import T5
from fastattn.lm.models.hf_formats.vit import VIT

FORMS = {form.model_type: form for form in (GPT2, BERT, LLAMA, T5, VIT)}

__all__ = ["FORMS", "Form", "Json", "Tensors"]
