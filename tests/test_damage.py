"""Damaged files are refused before they can do harm; journals and saved states are in `test_journal.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mobizo_compiler as mobizo
from mobizo_compiler import LoraConfig, Session, ZOConfig
from mobizo_compiler.device.journal import fingerprint
from mobizo_compiler.errors import ArtifactError, StateError
from mobizo_compiler.format import checksum, data_file
from mobizo_compiler.testing import TinyCausalLM, tiny_batch

pytestmark = pytest.mark.xdist_group("damage")  # one process, so that its programs are made once

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    torch.manual_seed(0)
    inputs, labels = tiny_batch()
    lora = LoraConfig(r=3, target_modules=("q_proj", "down_proj"))
    program = mobizo.compile(TinyCausalLM(layers=1).eval(), inputs, lora, ZOConfig(queries=2), state="data")
    session = Session(program.save(tmp_path_factory.mktemp("damage") / "program.pte"))
    for seed in range(3):
        session.train_step(inputs, labels, seed=seed, learning_rate=0.1)
    return session


@pytest.mark.slow
def test_damaged_files(session: Session, tmp_path: Path) -> None:
    """Programs, data files and adapters, in a process of their own: an error each time, and a state that stays."""
    program = session.program.artifact.path  # type: ignore[attr-defined]
    of_each = 168
    data, adapter = session.export_ptd(tmp_path / "state.ptd"), session.export_adapter(tmp_path / "adapter")
    arguments = [str(of_each), str(program), str(data), str(adapter), "--program", str(program)]
    command = [sys.executable, "-m", "tests.damaged_files", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    assert done.stdout.split() == ["program", str(of_each), "data", str(of_each), "adapter", str(of_each)]


def test_every_bit_of_a_short_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = checksum.sealed(b"content")
    path.write_bytes(whole)
    checksum.check(path)
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"no checksum|not that of its contents"):
            checksum.check(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="no checksum"):
            checksum.check(path)


@pytest.mark.slow
def test_data_files_of_others(session: Session, tmp_path: Path) -> None:
    """Without a checksum, as the C++ runtime writes them; and such that are not ours to take."""
    wanted = torch.arange(float(len(session.state())))
    path = tmp_path / "state.ptd"
    path.write_bytes(data_file.packed(wanted)[: -checksum.SIZE])
    with pytest.raises(ArtifactError, match="no checksum at its end"):
        session.import_ptd(path)
    session.import_ptd(path, verify=False)
    assert torch.equal(session.state(), wanted)

    path.write_bytes(data_file.packed(wanted, bytes(32)))
    with pytest.raises(ArtifactError, match="state of another program"):
        session.import_ptd(path)
    path.write_bytes(data_file.packed(torch.zeros(5), fingerprint(session.program)))
    with pytest.raises(StateError, match=r"not torch.float32\[5\]"):
        session.import_ptd(path)
    path.write_bytes(data_file.packed(wanted))
    with pytest.raises(ArtifactError, match=r"does not say which program its state is of(.|\n)*verify=False"):
        session.import_ptd(path)
    path.write_bytes(data_file.packed(wanted * torch.nan, fingerprint(session.program)))
    with pytest.raises(StateError, match="not finite"):
        session.import_ptd(path)
    path.write_bytes(data_file.packed(wanted).replace(b"mobizo_lora_b", b"other_lora_bb")[: -checksum.SIZE])
    with pytest.raises(ArtifactError, match="has no state that can be read: KeyError"):
        session.import_ptd(path, verify=False)
    path.write_bytes(b"FT01" * 100)
    with pytest.raises(ArtifactError, match="has no state that can be read"):
        session.import_ptd(path, verify=False)
    with pytest.raises(ArtifactError, match="no such file"):
        session.import_ptd(tmp_path / "nothing.ptd")
    assert torch.equal(session.state(), wanted)
