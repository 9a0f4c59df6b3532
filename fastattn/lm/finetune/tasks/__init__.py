"""The tasks of fine-tuning. The fields of their examples are in ``fastattn.lm.finetune.examples``."""

from fastattn.lm.finetune.tasks.answer import Answer
from fastattn.lm.finetune.tasks.base import Prediction, Task
from fastattn.lm.finetune.tasks.classify import Classify, MultiLabel, Regression
from fastattn.lm.finetune.tasks.generate import Chat, Instruct, Seq2Seq
from fastattn.lm.finetune.tasks.image import AnswerAboutImage, Caption, ClassifyImage
from fastattn.lm.finetune.tasks.prefer import Prefer
from fastattn.lm.finetune.tasks.tag import Tag

_ALL = (
    Classify, Regression, MultiLabel, Tag, Answer, Seq2Seq, Instruct, Chat, Prefer, ClassifyImage, Caption,
    AnswerAboutImage,
)  # fmt: skip
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}

__all__ = ["TASKS", "Prediction", "Task"]
