"""Hard labels: what distillation is measured against."""

from research.errors import ConfigError
from research.losses.supervised import cross_entropy
from research.methods.base import AbstractMethod, Component, Training
from research.records import ClassBatch
from research.teachers.base import AbstractTeacher


class Supervised(AbstractMethod):
    """Cross-entropy with the true class.

    label_smoothing  epsilon in [0, 1): the target is 1 - epsilon on the true class plus epsilon spread over all classes
    A teacher is not trained on; where one is given, the evaluator alone uses it.
    """

    def __init__(
        self, training: Training, teacher: AbstractTeacher | None = None, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(training, teacher)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"method.label_smoothing is {label_smoothing}; expected a number in [0, 1)")
        self.label_smoothing = label_smoothing

    def components(self, batch: ClassBatch) -> list[Component]:
        loss = cross_entropy(self.student(batch.inputs), batch.label_B, label_smoothing=self.label_smoothing)
        return [Component("hard", loss, 1.0, batch.step_rows)]
