"""Registers `torch.ops.moec.layer`: to be imported before `torch.export.load` of a program with compiled layers."""

from moec.frontends.torch.layer_op import layer_op

__all__ = ["layer_op"]
