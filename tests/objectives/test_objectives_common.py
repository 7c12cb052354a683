"""What holds for every objective: precision, extreme logits, gradients that do not leak, shapes, recipes, imports."""

import dataclasses
import subprocess
import sys
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError

from bdkd_dist.errors import UserError
from bdkd_dist.objectives import BDKD, CE, DML, OBJECTIVES, Losses, Objective

ALL: list[Objective] = [
    BDKD(),
    BDKD(temperature=2.5, entropy_temperature=3, teacher_term="balanced"),
    BDKD(gate="soft", teacher_term="balanced", nu_forward=3),
    BDKD(teacher_term="teacher_to_student", entropy_temperature=2),
    BDKD(teacher_term="none"),
    DML(weight=0.5),
    CE(),
]
every_objective = pytest.mark.parametrize(
    "objective", ALL, ids=["bdkd", "bdkd_warm", "bdkd_soft", "bdkd_reversed", "bdkd_alone", "dml", "ce"]
)

COMMON = {"student/ce", "teacher/ce", "student/entropy", "teacher/entropy", "forward_kl", "reverse_kl"}


def batch(samples: int = 12, classes: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        (2 * torch.randn(samples, classes, generator=generator)).to(dtype).requires_grad_() for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (samples,), generator=generator)


def scalars(losses: Losses) -> dict[str, torch.Tensor]:
    return {"student": losses.student_loss, "teacher": losses.teacher_loss, **losses.diagnostics}


@every_objective
def test_no_loss_sends_gradient_to_the_other_network(objective: Objective) -> None:
    student, teacher, targets = batch()
    losses = objective(student, teacher, targets)
    by_student, leak = torch.autograd.grad(
        losses.student_loss, (student, teacher), retain_graph=True, materialize_grads=True
    )
    assert by_student.norm() > 0
    assert leak.norm() == 0
    leak, by_teacher = torch.autograd.grad(losses.teacher_loss, (student, teacher), materialize_grads=True)
    assert by_teacher.norm() > 0
    assert leak.norm() == 0


@every_objective
def test_all_objectives_share_the_common_diagnostics(objective: Objective) -> None:
    found = objective(*batch()).diagnostics
    assert found.keys() - COMMON == ({"boosted_forward", "boosted_reverse"} if objective.name == "bdkd" else set())
    assert found.keys() >= COMMON
    assert all(value.shape == () and not value.requires_grad for value in found.values())


@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_ten_thousand_give_finite_losses_and_gradients(objective: Objective, dtype: torch.dtype) -> None:
    sure = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, -1e4, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    student, teacher = sure.clone().requires_grad_(), sure.roll(1, dims=0).requires_grad_()
    losses = objective(student, teacher, torch.tensor([1, 0, 2, 1]))
    (losses.student_loss + losses.teacher_loss).backward()
    for name, value in scalars(losses).items():
        assert value.isfinite(), name
    for logits in (student, teacher):
        assert logits.grad is not None
        assert logits.grad.dtype == dtype
        assert logits.grad.isfinite().all()
    assert losses.student_loss > 1e3  # the networks do disagree by that much


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_first(objective: Objective, dtype: torch.dtype) -> None:
    student, teacher, targets = batch(dtype=dtype)
    narrow, wide = objective(student, teacher, targets), objective(student.float(), teacher.float(), targets)
    for name, value in scalars(narrow).items():
        assert value.dtype == torch.float32, name
        assert value == scalars(wide)[name], name


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_the_losses(objective: Objective, dtype: torch.dtype) -> None:
    for inputs in (batch(), batch(dtype=dtype)):
        outside = objective(*inputs)
        with torch.autocast("cpu", dtype=dtype):
            inside = objective(*inputs)
        for name, value in scalars(inside).items():
            assert value.dtype == torch.float32, name
            assert value == scalars(outside)[name], name


def test_the_formulas_run_outside_autocast() -> None:
    class Products(Objective):
        """Autocast would multiply these in half precision."""

        name = "products"

        def losses(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor) -> Losses:
            loss = (student_logits @ teacher_logits.T).mean()
            return Losses(loss, loss, {})

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Products()(*batch()).student_loss.dtype == torch.float32


@every_objective
def test_float64_stays_float64(objective: Objective) -> None:
    losses = objective(*batch(dtype=torch.float64))
    assert {value.dtype for value in scalars(losses).values()} == {torch.float64}


@every_objective
def test_one_hot_targets_equal_class_indices(objective: Objective) -> None:
    student, teacher, targets = batch()
    one_hot = torch.nn.functional.one_hot(targets, 6)
    for dtype in (torch.float32, torch.float16):
        torch.testing.assert_close(
            objective(student, teacher, one_hot.to(dtype)), objective(student, teacher, targets), rtol=0, atol=0
        )


@every_objective
def test_smoothed_targets_equal_torchs_cross_entropy(objective: Objective) -> None:
    student, teacher, targets = batch()
    smooth = 0.9 * torch.nn.functional.one_hot(targets, 6) + 0.1 / 6
    found = objective(student, teacher, smooth).diagnostics
    for name, logits in (("student/ce", student), ("teacher/ce", teacher)):
        expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).detach()
        torch.testing.assert_close(found[name], expected)


def test_a_target_that_is_no_class_is_not_ignored() -> None:
    student, teacher, targets = batch()
    targets[0] = -100  # what torch's cross-entropy would leave out without a word
    with pytest.raises((RuntimeError, IndexError)):
        CE()(student, teacher, targets)


@pytest.mark.parametrize(
    ("student", "teacher", "targets"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4)),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> None:
    for objective in (BDKD(), DML(), CE()):
        with pytest.raises(UserError) as caught:
            objective(student, teacher, targets)
        line = str(caught.value)
        assert "\n" not in line
        for word in (*(str(tuple(t.shape)) for t in (student, teacher, targets)), "(B, K)"):
            assert word in line


def test_the_registry_names_each_class_by_its_own_name() -> None:
    assert {name: objective().name for name, objective in OBJECTIVES.items()} == {n: n for n in ("bdkd", "dml", "ce")}


def section() -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[BDKD | DML | CE, Field(discriminator="name")])


@every_objective
def test_an_objective_reads_back_from_its_own_dict(objective: Any) -> None:
    plain = dataclasses.asdict(objective)
    assert plain.keys() == {field.name for field in dataclasses.fields(objective)}
    assert plain["name"] == objective.name
    assert section().validate_python(plain) == objective


@pytest.mark.parametrize(
    ("plain", "word"),
    [
        ({"name": "bdkd", "nu_foward": 3}, "nu_foward"),
        ({"name": "dml", "nu_forward": 3}, "nu_forward"),
        ({"name": "ce", "weight": 1}, "weight"),
        ({"name": "kl"}, "kl"),
        ({"name": "bdkd", "temperature": 0}, "temperature=0.0 is not allowed"),
        ({"name": "bdkd", "gate": "medium"}, "'hard' or 'soft'"),
        ({"name": "dml", "weight": -1}, "weight=-1.0 is not allowed"),
    ],
)
def test_a_wrong_section_is_refused(plain: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        section().validate_python(plain)


def test_the_import_needs_nothing_beyond_torch_and_the_standard_library() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import bdkd_dist.objectives;print(*(set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    gained = set(printed.split())
    assert "bdkd_dist.objectives.bdkd" in gained
    roots = {name.partition(".")[0] for name in gained}
    assert roots <= set(sys.stdlib_module_names) | {"bdkd_dist"}
    ours = {name for name in gained if name.startswith("bdkd_dist.") and ".objectives" not in name}
    assert ours == {"bdkd_dist.errors"}


@pytest.mark.slow
@every_objective
def test_the_objective_is_one_graph_and_gives_the_same(objective: Objective) -> None:
    check_compiled(objective, backend="aot_eager")


@pytest.mark.slow
def test_the_compiled_objective_gives_the_same() -> None:
    check_compiled(BDKD(temperature=2.5, entropy_temperature=3, teacher_term="balanced"), backend="inductor")


def check_compiled(objective: Objective, backend: str) -> None:
    def losses_and_gradients(function: Any, targets: torch.Tensor) -> tuple[Losses, tuple[torch.Tensor, ...]]:
        student, teacher, _ = batch()
        losses = function(student, teacher, targets)
        return losses, torch.autograd.grad(losses.student_loss + losses.teacher_loss, (student, teacher))

    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    indices = batch()[2]
    for targets in (indices, torch.nn.functional.one_hot(indices, 6).float()):
        torch.testing.assert_close(
            losses_and_gradients(compiled, targets), losses_and_gradients(objective, targets), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_the_objective_compiles_as_a_part_of_a_larger_graph_under_autocast() -> None:
    torch._dynamo.reset()
    layer = torch.nn.Linear(5, 6)

    def step(x: torch.Tensor, targets: torch.Tensor) -> Losses:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return BDKD(temperature=2)(layer(x), layer(-x), targets)

    x, targets = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), batch()[2]
    losses = torch.compile(step, fullgraph=True, backend="aot_eager")(x, targets)
    assert losses.student_loss.dtype == torch.float32
    torch.testing.assert_close(losses, step(x, targets), rtol=1e-2, atol=1e-2)
