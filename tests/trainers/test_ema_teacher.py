"""The moving average of weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nnmosaic.trainers.ema_teacher import EMATeacher, forgetting_momentum


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False).double()
        self.register_buffer("seen", torch.zeros(1))
        self.decoder = SimpleNamespace(deep_supervision=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_weights_follow_the_closed_form() -> None:
    student = Student()
    teacher = EMATeacher(student)
    first = student.layer.weight.detach().clone()
    weights = [torch.tensor([[k + 1.0, -k]]).double() for k in range(6)]
    for weight in weights:
        with torch.no_grad():
            student.layer.weight.copy_(weight)
            student.seen += 1
        teacher.update(student, 0.6)
    n = len(weights)
    expected = 0.6**n * first + 0.4 * sum(
        0.6 ** (n - k) * weight for k, weight in enumerate(weights, start=1)
    )
    torch.testing.assert_close(teacher.network.layer.weight, expected, rtol=1e-12, atol=1e-14)
    assert teacher.network.seen.item() == 6


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_0_is_the_student_and_1_stands_still(momentum: float) -> None:
    student = Student()
    teacher = EMATeacher(student)
    before = teacher.network.layer.weight.clone()
    with torch.no_grad():
        student.layer.weight += 0.3
    teacher.update(student, momentum)
    expected = before if momentum else student.layer.weight
    assert torch.equal(teacher.network.layer.weight, expected)


def test_forgetting_momentum_is_the_plain_mean_at_first() -> None:
    teacher, mean = 7.0, 0.0
    for n, value in enumerate((2.0, 4.0, 9.0)):
        momentum = forgetting_momentum(n, 0.99)
        teacher = momentum * teacher + (1 - momentum) * value
        mean += value / 3
    assert teacher == pytest.approx(mean)
    assert forgetting_momentum(1000, 0.99) == 0.99


def test_the_teacher_is_apart_from_training() -> None:
    student = Student()
    before = copy.deepcopy(student.state_dict())
    teacher = EMATeacher(student)
    assert not teacher.network.training
    assert student.training
    assert not teacher.network.decoder.deep_supervision
    assert student.decoder.deep_supervision
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not teacher(torch.ones(1, 2).double().requires_grad_()).requires_grad
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key])
