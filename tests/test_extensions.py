"""Extensions of other packages, found by entry point: estimators, update rules, losses; some of them are broken."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import CausalLMLoss, LoraConfig, Session, ZOConfig
from mobizo_compiler.backends import BACKENDS, get_backend
from mobizo_compiler.errors import ConfigError, ExtensionUnavailableError, UnknownBackendError, UnknownExtensionError
from mobizo_compiler.extensions import Registry
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.reference import ReferenceStep
from mobizo_compiler.step.estimators import ESTIMATORS, TwoSided, get_estimator, register_estimator
from mobizo_compiler.step.losses import LOSSES, get_loss
from mobizo_compiler.step.rules import RULES, SGD, Adam, get_rule, register_rule
from mobizo_compiler.testing import TokenWise

ROOT = Path(__file__).parent.parent

SOUND = """
import dataclasses
import torch
from mobizo_compiler.step import Estimator, LabelSpec, Loss, UpdateRule

@dataclasses.dataclass(frozen=True)
class Wide(Estimator):
    factor: float = 2.0

    def lanes(self, queries):
        return 2 * queries

    def perturbed(self, trained_P, step_QP):
        return torch.cat((trained_P + self.factor * step_QP, trained_P - self.factor * step_QP))

    def projected_gradient(self, loss_G, eps_1):
        queries = loss_G.shape[0] // 2
        return (loss_G[:queries] - loss_G[queries:]) / (eps_1 * (2 * self.factor))

@dataclasses.dataclass(frozen=True)
class Slow(UpdateRule):
    share: float = 0.5

    def update(self, direction_P, memory):
        return direction_P * self.share, memory

@dataclasses.dataclass(frozen=True)
class Hinge(Loss):
    margin: float = 1.0

    def label_spec(self, outputs):
        return LabelSpec(tuple(outputs["logits"].shape[:1]), torch.int64, 0, outputs["logits"].shape[-1] - 1)

    def __call__(self, outputs, labels):
        scores_NV = outputs["logits"][:, -1].float()
        right_N1 = scores_NV.gather(1, labels[:, None])
        losses_N = torch.relu(self.margin + scores_NV - right_N1).mean(dim=1)
        return losses_N, torch.ones_like(losses_N)
"""
GROUPS = {"estimators": "wide = mine:Wide", "rules": "slow = mine:Slow", "losses": "hinge = mine:Hinge"}


def install(folder: Path, monkeypatch: Any, source: str = SOUND, name: str = "mine", **groups: str) -> None:
    """A real distribution, as pip would leave it."""
    folder.mkdir(exist_ok=True)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    text = "".join(f"[mobizo_compiler.{group}]\n{entries}\n" for group, entries in (groups or GROUPS).items())
    (info / "entry_points.txt").write_text(text)
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


class Named(TokenWise):
    """Returns its logits by name."""

    def forward(self, tokens: torch.Tensor) -> Any:
        return {"logits": super().forward(tokens)}


TOKENS = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]])


def compiled(**options: Any) -> mobizo.Program:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=("up",))
    return mobizo.compile(Named().eval(), (TOKENS,), lora, **{"backend": "portable", **options})


def test_those_of_a_package_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert ESTIMATORS.names()["wide"] == "mine:Wide" and RULES.names()["slow"] == "mine:Slow"
    assert "mine" not in sys.modules, "listing must not import"
    assert (RULES.origins()["slow"][0].distribution, RULES.origins()["adam"][0].distribution) == ("mine 1.0", None)
    zo = ZOConfig(queries=2, estimator="wide")
    assert zo.to_json()["estimator"] == {"name": "wide", "factor": 2.0}
    wider = ZOConfig.from_json({**zo.to_json(), "estimator": {"name": "wide", "factor": 3.0}})
    assert wider == ZOConfig(queries=2, estimator=type(get_estimator("wide"))(3.0)) != zo  # type: ignore[call-arg]
    rule = get_rule({"name": "slow", "share": 0.25})
    assert RULES.described(rule) == {"name": "slow", "weight_decay": 0.0, "share": 0.25}
    assert ZOConfig(estimator=TwoSided()) == ZOConfig(estimator="two-sided")


def test_a_file_with_somebodys_rule_opens_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that was told nothing: name and options are in the file, and the classes behind them are found."""
    install(tmp_path / "site", monkeypatch)
    mine = {"rule": {"name": "slow", "share": 0.25}, "loss": {"name": "hinge", "margin": 2.0}}
    program = compiled(zo=ZOConfig(queries=2, estimator="wide"), **mine)
    program.save(tmp_path / "program.pte")
    code = """
        import json, sys, mobizo_compiler as mobizo
        from mobizo_compiler.step.losses import get_loss
        from mobizo_compiler.step.rules import get_rule
        manifest = mobizo.load(sys.argv[1]).manifest
        rule = get_rule(manifest.rule)
        found = manifest.zo.estimator, rule, get_loss(manifest.loss)
        print(json.dumps([*map(repr, found), manifest.zo.lanes, rule.__module__]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "program.pte"],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "Wide(factor=2.0)",
        "Slow(weight_decay=0.0, share=0.25)",
        "Hinge(margin=2.0)",
        4,
        "mine",
    ]


def test_its_rule_and_estimator_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Wide` with eps is two-sided with twice the eps, and `Slow` is plain descent with half of the learning rate."""
    install(tmp_path, monkeypatch)
    states = []
    for zo, rule, rate, eps in (
        (ZOConfig(queries=2, estimator="wide"), "slow", 0.2, 0.05),
        (ZOConfig(queries=2), "sgd", 0.1, 0.1),
    ):
        program = compiled(zo=zo, rule=rule, backend="eager")
        session = Session(program)
        session.load_state(torch.full((program.parameters,), 0.1))
        session.train_step((TOKENS,), TOKENS, seed=3, learning_rate=rate, eps=eps)
        states.append(session.state())
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)
    assert not torch.equal(states[0], torch.full_like(states[0], 0.1))


def test_the_reference_is_made_from_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with loss, rule and estimator of a package, against plain PyTorch that was told the manifest."""
    install(tmp_path, monkeypatch)
    program = compiled(zo=ZOConfig(queries=2, estimator="wide"), rule="slow", loss="hinge", backend="eager")
    session = Session(program)
    torch.manual_seed(0)
    reference = ReferenceStep.of(Named().eval(), program)
    start = torch.randn(program.parameters, generator=torch.Generator().manual_seed(1)) * 0.3
    session.load_state(start)
    reference.state.copy_(start)
    labels = torch.tensor([3, 7])
    for stepper in (session, reference):
        result = stepper.train_step((TOKENS,), labels, seed=1, learning_rate=0.1, eps=0.05)
        assert result.lane_losses.std() > 1e-3
    # Losses near 1 carry 1e-6 of rounding, g that over eps, and the state 0.1 * 0.5 * 6 times that of g.
    torch.testing.assert_close(session.state(), reference.state, rtol=0, atol=1e-5)
    assert not torch.equal(reference.state, start)


def test_the_manifest_comes_back_from_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    zo = ZOConfig(queries=2, estimator="wide")
    manifest = compiled(zo=zo, rule="adam", loss="hinge", backend="eager").manifest
    again = Manifest.from_json(manifest.to_json(), "memory")
    assert {f.name for f in dataclasses.fields(again) if getattr(again, f.name) != getattr(manifest, f.name)} == set()


def test_a_loss_that_is_a_function_is_not_in_the_file() -> None:
    function = compiled(loss=lambda o, y: o["logits"].mean((1, 2)) * y, example_labels=torch.ones(2), backend="eager")
    assert function.manifest.loss["name"] == "function" and "<lambda>" in function.manifest.loss["function"]
    with pytest.raises(ConfigError, match=r"the function '.*<lambda>', which cannot be made from its name"):
        get_loss(function.manifest.loss)


BROKEN = {
    "raises on import": ("raise OSError('libmine.so is missing')", "cannot be loaded: libmine.so is missing"),
    "leaves on import": ("import sys\nsys.exit('no licence')", "cannot be loaded: no licence"),
    "is not there": ("", "has no attribute 'Slow'"),
    "an instance": (
        SOUND + "\nSlow = Slow()",
        "not an update rule: it is a Slow, not a dataclass derived from UpdateRule",
    ),
    "a number": ("Slow = 3", "not an update rule: it is an int, not"),
    "another kind": (SOUND + "\nSlow = Wide", "it is the class Wide, not a dataclass derived from UpdateRule"),
    "abstract": (SOUND + "\nclass Slow(UpdateRule): pass", "it has no update"),
    "no dataclass": (SOUND + "\nclass Slow(Slow):\n    more: int = 3", "not a frozen dataclass"),
    "a name of its own": (
        SOUND + "\n@dataclasses.dataclass(frozen=True)\nclass Slow(Slow):\n    name: str = 'x'",
        "an option called 'name'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_that_cannot_be_loaded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reason = BROKEN[case]
    install(tmp_path, monkeypatch, source)
    assert "slow" in RULES.names() and get_rule("adam") == Adam() and RULES.described(SGD())["name"] == "sgd"
    for use in (get_rule, lambda name: compiled(rule=name)):
        with pytest.raises(ExtensionUnavailableError, match=rf"update rule 'slow' \(mine:Slow\).*{reason}"):
            use("slow")


def test_options_that_the_class_chokes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "\nclass Slow(Slow):\n    def __post_init__(self):\n        raise ZeroDivisionError('share')"
    install(tmp_path, monkeypatch, SOUND + more)
    with pytest.raises(ConfigError, match=r"update rule 'slow' does not take {'share': 0}: share"):
        get_rule({"name": "slow", "share": 0})


def test_a_name_that_two_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "one", monkeypatch)
    install(tmp_path / "two", monkeypatch, name="other", rules="slow = other:Slow\nadam = other:Slow")
    for name, first in (("slow", "mine:Slow|other:Slow"), ("adam", "mobizo_compiler.*:Adam")):
        with pytest.raises(UnknownExtensionError, match=rf"'{name}' is claimed by '({first})' and by "):
            get_rule(name)
    assert get_rule("momentum").beta == 0.9, "the neighbours work"  # type: ignore[attr-defined]
    assert RULES.names()["adam"] == "mobizo_compiler.step.rules:Adam and other:Slow"


def test_the_same_package_in_two_places_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "one", monkeypatch)
    install(tmp_path / "two", monkeypatch)
    assert type(get_rule("slow")).__name__ == "Slow"


def test_what_is_no_extension_is_refused_by_name() -> None:
    with pytest.raises(UnknownExtensionError, match=r"no update rule 'newton'(.|\n)*adam, adamw, momentum, .*sgd"):
        get_rule("newton")
    with pytest.raises(ConfigError, match=r"update rule is the class Adam(.|\n)*make one of it: Adam\(\)"):
        get_rule(Adam)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the estimator is 3(.|\n)*one-sided, two-sided, or an Estimator"):
        ZOConfig(estimator=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the loss is the class CausalLMLoss(.|\n)*make one of it: CausalLMLoss\(\)"):
        compiled(loss=CausalLMLoss)
    for loss in (3, torch.nn.MSELoss):
        with pytest.raises(ConfigError, match=r"the loss is (3|the class MSELoss)(.|\n)*causal-lm, .*or a Loss"):
            compiled(loss=loss)
    with pytest.raises(ConfigError, match="ChoiceLoss needs 'choices'"):
        compiled(loss="choice")
    with pytest.raises(ConfigError, match="Nameless has no name"):
        compiled(loss=type("Nameless", (CausalLMLoss,), {})())
    with pytest.raises(ConfigError, match=r"the update rule is TwoSided\(\)"):
        get_rule(TwoSided())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'beta'(.|\n)*its fields are"):
        get_rule({"name": "sgd", "beta": 0.5})
    with pytest.raises(UnknownBackendError, match=r"EagerBackend(.|\n)*make one of it"):
        get_backend(BACKENDS.load("eager").__class__)
    with pytest.raises(ConfigError, match="Mean has no name under which a program can have it as its update rule"):
        RULES.described(type("Mean", (Adam,), {})())


def test_registered_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same registry, the same checks."""
    for registry in (ESTIMATORS, RULES):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    mine = type("Mine", (Adam,), {"__module__": __name__})
    register_rule("mine", mine)
    assert get_rule({"name": "mine", "beta1": 0.5}) == mine(beta1=0.5)
    assert RULES.described(mine())["name"] == "mine" and RULES.names()["mine"] == f"{__name__}:Mine"
    register_estimator("both-sides", type("Both", (TwoSided,), {})())
    assert ZOConfig(queries=3, estimator="both-sides").lanes == 6
    for name, value, reason in (
        ("mine", type("Other", (Adam,), {"__module__": __name__}), "already"),
        ("sgd", mine, "already"),
        ("x", SGD(), "derived"),
        ("", mine, "text"),
    ):
        with pytest.raises(ConfigError, match=reason):
            register_rule(name, value)  # type: ignore[arg-type]


def test_one_mechanism_for_all_kinds() -> None:
    assert all(isinstance(registry, Registry) for registry in (ESTIMATORS, RULES, LOSSES, BACKENDS))
    assert len({registry.group for registry in (ESTIMATORS, RULES, LOSSES, BACKENDS)}) == 4
