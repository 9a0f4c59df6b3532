"""Hugging Face's forms of the models, one to a file. Reading and writing files is the business of ``convert.py``."""

from fastattn.models.forms.bert import BERT
from fastattn.models.forms.form import Form, Json, Tensors
from fastattn.models.forms.gpt2 import GPT2
from fastattn.models.forms.llama import LLAMA
from fastattn.models.forms.t5 import T5
from fastattn.models.forms.vit import VIT

FORMS = {form.model_type: form for form in (GPT2, BERT, LLAMA, T5, VIT)}

__all__ = ["FORMS", "Form", "Json", "Tensors"]
