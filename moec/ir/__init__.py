"""The sparse-expert IR: types, ops, regions and their text. Imports no tensor library."""

from moec.ir.builder import Builder, Names
from moec.ir.core import OPS, Node, Op, Region, Value, find_op, op, require
from moec.ir.diff import diff
from moec.ir.ops_activation import FUNCTIONS, FUSED_LAYOUTS, Act, Glu
from moec.ir.ops_combine import Combine, IdentityRows, KeptWeights, ScaleRows
from moec.ir.ops_dense import CombineDense, DispatchDense
from moec.ir.ops_elementwise import Add, Mul, Pointwise
from moec.ir.ops_fused import DenseFfn, ExpertFfn, ExpertGlu
from moec.ir.ops_group import Exchange, Gather, Group
from moec.ir.ops_linear import GroupedLinear, Linear, QuantizeRows
from moec.ir.ops_norm import BatchNorm, Norm
from moec.ir.ops_opaque import Opaque
from moec.ir.ops_route import Route, RouteExperts
from moec.ir.ops_weights import ConcatWeights, Constant, QuantizeWeight, SelectExperts, Weight
from moec.ir.program import Graph, Program, verify_program
from moec.ir.rewrite import Rewriter, drop_dead, substitute
from moec.ir.sizes import bind_sizes
from moec.ir.text import parse, parse_program
from moec.ir.types import DTYPES, FLOATS, INDICES, Dim, Tensor, ceildiv, floordiv, maximum, minimum
from moec.ir.verify import verify

__all__ = [
    "DTYPES",
    "FLOATS",
    "FUNCTIONS",
    "FUSED_LAYOUTS",
    "INDICES",
    "OPS",
    "Act",
    "Add",
    "BatchNorm",
    "Builder",
    "Combine",
    "CombineDense",
    "ConcatWeights",
    "Constant",
    "DenseFfn",
    "Dim",
    "DispatchDense",
    "Exchange",
    "ExpertFfn",
    "ExpertGlu",
    "Gather",
    "Glu",
    "Graph",
    "Group",
    "GroupedLinear",
    "IdentityRows",
    "KeptWeights",
    "Linear",
    "Mul",
    "Names",
    "Node",
    "Norm",
    "Op",
    "Opaque",
    "Pointwise",
    "Program",
    "QuantizeRows",
    "QuantizeWeight",
    "Region",
    "Rewriter",
    "Route",
    "RouteExperts",
    "ScaleRows",
    "SelectExperts",
    "Tensor",
    "Value",
    "Weight",
    "bind_sizes",
    "ceildiv",
    "diff",
    "drop_dead",
    "find_op",
    "floordiv",
    "maximum",
    "minimum",
    "op",
    "parse",
    "parse_program",
    "require",
    "substitute",
    "verify",
    "verify_program",
]
