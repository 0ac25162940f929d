"""Pytrees of arrays as one vector.

On a GPU what is done to every parameter is then one kernel, not one for each of some hundred
arrays, and devices add up all gradients in one reduction.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

_ALIGNED = 16  # values; vector loads of up to 32 bytes need it


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the leaves of a pytree lie in a vector; from `layout_of`.

    Arrays of more than one axis, which are weights, come first, so that weight decay is a matter of
    the place; in both parts leaves of odd sizes come last, so that they shift no other.

    Attributes:
      treedef: of the pytree.
      shapes, offsets: of its leaves, in the order of the pytree.
      matrix_values: values of the leaves of more than one axis.
      size: values of all leaves.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    matrix_values: int
    size: int

    def parts(self, tree: Any) -> list[jax.Array]:
        """Returns the vectors, float32, that one of a pytree of this structure consists of."""
        leaves = self.treedef.flatten_up_to(tree)
        order = sorted(range(len(leaves)), key=lambda index: self.offsets[index])
        return [leaves[index].reshape(-1).astype(jnp.float32) for index in order]

    def pack(self, tree: Any) -> "Packed":
        """Returns a pytree of this structure as one float32 vector."""
        return Packed(jnp.concatenate([*self.parts(tree), jnp.zeros(0)]), self)


@functools.cache
def _create_layout(treedef: Any, shapes: tuple[tuple[int, ...], ...]) -> Layout:
    sizes = [math.prod(shape) for shape in shapes]
    order = sorted(
        range(len(shapes)), key=lambda index: (len(shapes[index]) < 2, sizes[index] % _ALIGNED > 0)
    )
    offsets, size = [0] * len(shapes), 0
    for index in order:
        offsets[index] = size
        size += sizes[index]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    return Layout(treedef, shapes, tuple(offsets), matrices, size)


def layout_of(tree: Any) -> Layout:
    """Returns the layout of a pytree of arrays; pytrees of equal shapes have the same object."""
    leaves, treedef = jax.tree.flatten(tree)
    return _create_layout(treedef, tuple(leaf.shape for leaf in leaves))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree of arrays as one vector; itself a pytree, of that vector.

    So `jax.tree.map` over it is arithmetic on the vector, and Optax keeps moments as vectors.

    Attributes:
      vector: float32 (layout.size,).
      layout: of the pytree.
    """

    vector: Any
    layout: Layout

    def unpack(self) -> Any:
        """Returns the pytree; its arrays are slices of the vector."""
        layout = self.layout
        leaves = [
            lax.slice(self.vector, (at,), (at + math.prod(shape),)).reshape(shape)
            for at, shape in zip(layout.offsets, layout.shapes, strict=True)
        ]
        return jax.tree.unflatten(layout.treedef, leaves)

    def matrices(self) -> "Packed":
        """Returns the same with zeros in place of the leaves of at most one axis."""
        is_matrix = jnp.arange(self.layout.size) < self.layout.matrix_values
        return Packed(jnp.where(is_matrix, self.vector, 0.0), self.layout)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Layout]:
        """Returns the vector and the layout, for JAX.

        An empty vector is left out: XLA of jaxlib 0.11.2 crashes over one on several CPU devices.
        """
        return (self.vector,) if self.layout.size else (), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: tuple[Any, ...]) -> "Packed":
        """Returns the object of a vector and a layout, for JAX."""
        return cls(children[0] if children else np.zeros(0, np.float32), layout)


def is_packed(node: Any) -> bool:
    """Returns whether a node of a pytree is a `Packed`."""
    return isinstance(node, Packed)


def pack(tree: Any) -> Packed:
    """Returns a pytree of arrays as one vector."""
    return layout_of(tree).pack(tree)


def unpack_nodes(tree: Any) -> Any:
    """Returns a pytree with each `Packed` in it replaced by its own pytree."""
    return jax.tree.map(
        lambda node: node.unpack() if is_packed(node) else node, tree, is_leaf=is_packed
    )


def pack_like(like: Any, tree: Any) -> Any:
    """Returns what `unpack_nodes` made `tree` of: packed wherever `like` is."""
    return jax.tree.map(
        lambda node, part: node.layout.pack(part) if is_packed(node) else part,
        like, tree, is_leaf=is_packed,
    )  # fmt: skip


class Place(NamedTuple):
    """Where the values of a parameter lie: from `offset` on in `vector`."""

    vector: jax.Array
    offset: int


def place_of(param: Any, dtype: Any = jnp.float32) -> Place:
    """Returns the place of a parameter (`nnx.Param`) of a network that is being applied.

    For kernels that read weights in place: a slice of its own would be one more kernel. No gradient
    flows through it, so the parameter itself must be an operand as well.

    Args:
      param: of the network.
      dtype: of the vector.
    """
    vector, offset = param.get_metadata("place", None) or (param[...].reshape(-1), 0)
    return Place(lax.stop_gradient(vector).astype(dtype), offset)


def exact(param: Any) -> jax.Array:
    """Returns the float32 value of a parameter, also where `set_places` rounded it."""
    value = param.get_metadata("exact", None)
    return param[...] if value is None else value


def set_places(network: nnx.Module, packed: Packed) -> None:
    """Tells each parameter of a network where it lies, and takes rounded weights from there.

    A layer that computes in another dtype than float32 rounds its weights. One by one that would be
    a kernel each; taken from the rounded vector they are slices.
    """
    offsets = jax.tree.unflatten(packed.layout.treedef, packed.layout.offsets)
    for path, module in nnx.iter_modules(network):
        node = functools.reduce(lambda tree, key: tree.get(key, {}), path, offsets)
        dtype = getattr(module, "dtype", jnp.float32)
        for name, param in vars(module).items():
            if isinstance(param, nnx.Param):
                value = param[...]
                param.set_metadata("place", Place(packed.vector, node[name]))
                param.set_metadata("exact", value)
                if name == "weight" and dtype != jnp.float32:
                    vector, offset = place_of(param, dtype)
                    rounded = lax.slice(vector, (offset,), (offset + value.size,))
                    param.set_value(_rounded(value, rounded.reshape(value.shape)))


@jax.custom_vjp
def _rounded(value: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns `rounded`, which is `value` in another dtype, as a function of `value`."""
    return rounded


_rounded.defvjp(
    lambda value, rounded: (rounded, None),
    lambda _, gradient: (gradient.astype(jnp.float32), None),
)
