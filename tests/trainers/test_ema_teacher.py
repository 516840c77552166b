"""The moving average of weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nnmosaic.trainers.ema_teacher import EMATeacher


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
    teacher = EMATeacher(student, decay=0.6)
    expected = student.layer.weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            student.layer.weight.copy_(torch.tensor([[n + 1.0, -n]]))
            student.seen += 1
        teacher.update(student)
        momentum = min(0.6, n / (n + 1))
        expected = momentum * expected + (1 - momentum) * student.layer.weight.detach()
        torch.testing.assert_close(teacher.network.layer.weight, expected, rtol=1e-12, atol=0)
    assert teacher.network.seen.item() == 6


def test_the_teacher_is_apart_from_training() -> None:
    student = Student()
    before = copy.deepcopy(student.state_dict())
    teacher = EMATeacher(student, decay=0.9)
    assert not teacher.network.training
    assert student.training
    assert not teacher.network.decoder.deep_supervision
    assert student.decoder.deep_supervision
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not teacher(torch.ones(1, 2).double().requires_grad_()).requires_grad
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key])


def test_it_goes_on_from_a_checkpoint() -> None:
    student = Student()
    teacher = EMATeacher(student, decay=0.9)
    other = EMATeacher(Student(), decay=0.9)
    teacher.update(student)
    other.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.layer.weight += 1
    teacher.update(student)
    other.update(student)
    assert torch.equal(teacher.network.layer.weight, other.network.layer.weight)
    assert other.updates == 2


def test_first_update_forgets_the_random_weights() -> None:
    teacher = EMATeacher(Student(), decay=0.99)
    student = Student()
    teacher.update(student)
    assert torch.equal(teacher.network.layer.weight, student.layer.weight)
    assert teacher.updates == pytest.approx(1)
