"""Fine-tuning and evaluation: from labelled examples to a model for a task and its scores.

Needs ``pip install 'fastattn[eval]'``, and ``'fastattn[lora]'`` for adapters.
"""

from fastattn.lm.finetune.config import FinetuneConfig
from fastattn.lm.finetune.evaluate import Evaluation, evaluate
from fastattn.lm.finetune.load import Finetuned, load_finetuned
from fastattn.lm.finetune.run import finetune

__all__ = ["Evaluation", "FinetuneConfig", "Finetuned", "evaluate", "finetune", "load_finetuned"]
