"""A backend of `mobizo_compiler`: the network in ExecuTorch's OpenVINO delegate, all else in portable kernels."""

from mobizo_openvino.backend import MobizoOpenvino

__all__ = ["MobizoOpenvino"]
