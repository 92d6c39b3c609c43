"""A backend of `mobizo_compiler`: PyTorch runs the graphs operator by operator, from files of its own."""

import io

import torch

from mobizo_compiler.backends import Artifact, Backend
from mobizo_compiler.format import checksum
from mobizo_compiler.format.files import write_whole
from mobizo_compiler.format.manifest import Manifest
from mobizo_compiler.format.program import Program
from mobizo_compiler.graph import GraphProgram
from mobizo_compiler.graph.eager import EagerRunner

MAGIC = b"mobizo torch file 1\n"


class TorchFile(Backend):
    """Graphs as they are, in files that torch writes and `suffix` names."""

    name, suffix = "torch-file", ".torch"

    def lower(self, methods, manifest):
        return TorchFileArtifact(methods, manifest, methods["train_step"].lora_a)

    def reads(self, path):
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def load(self, path, verify):
        if verify:
            checksum.check(path)
        content, manifest, lora_a = torch.load(io.BytesIO(path.read_bytes()[len(MAGIC) : -checksum.SIZE]))
        methods = {name: GraphProgram(torch.export.load(io.BytesIO(g)), outputs=o) for name, (g, o) in content.items()}
        manifest = Manifest.from_json(manifest, where=str(path))
        return Program(manifest, TorchFileArtifact(methods, manifest, lora_a), lora_a)


class TorchFileArtifact(Artifact):
    """The graphs, and what their file needs beside them."""

    def __init__(self, methods, manifest, lora_a):
        self.methods, self.manifest, self.lora_a = methods, manifest, dict(lora_a)

    def runner(self):
        return EagerRunner(self.methods)

    def save(self, path):
        content = {}
        for name, method in self.methods.items():
            torch.export.save(method.exported, graph := io.BytesIO())
            content[name] = graph.getvalue(), method.outputs
        torch.save((content, self.manifest.to_json(), self.lora_a), data := io.BytesIO())
        write_whole(io.BytesIO(checksum.sealed(MAGIC + data.getvalue())), path)
