"""Structural pruning of any JAX function, from its jaxpr.

How it works. ``program.read_program`` traces the function and walks its equations once (``walk``; what it knows of
operands: ``steps``). Each axis of each array carries a *label*: the elements (integer names) that stand along it
(``labels``). Each position of each parameter axis starts as an element of its own; the rule of each primitive (the
``rules_*`` modules) labels the outputs, records which elements are one and the same (``elements``), and says how to run
the operation at other sizes. A merged axis (flatten, heads times dims) is made of joint elements that live while all
their factors live; a split axis whose rows may lose different positions (the dims of each head) must keep its rows
equally long. Arguments and outputs never change. A primitive without a rule that meets a parameter raises.

``solve`` resolves all that to classes and ``groups`` to units that can go by themselves, sorted into groups;
``importance`` scores and ``select`` chooses them; ``plan`` writes down the survivors (``schema`` says in what form).
The smaller function (``pruning.smaller_function``) walks the dense program at the shapes of the call and runs every
equation at its new size (``cut``), so it needs no second description of the network.

``recovery`` fits the layers that lost inputs to the dense network, without training: ``flatten`` gives one list of
equations, ``consumers`` finds the layers in it, ``products`` writes each as a regression, ``least_squares`` solves it.

What changes besides sizes: a sum over a cut axis divided by the axis' length (a mean, as in layer norm) divides by the
new length, as in a network built small from the start. What counts is the number: ``x.sum(-1) / 8`` over 8 positions is
a mean too. Every other number in the program stays, the attention scale among them, and the n - 1 of a corrected
variance. Zeroing and cutting therefore agree exactly where nothing is normalised over a cut axis, and where what is
summed over it is zero at a dead unit: a sum of sigmoids, or of copies made by broadcasting, has fewer terms, as in a
network built small; so has a softmax, a maximum or a cumulative product over units. Constants that are not uniform
(masks, position tables, captured arrays, noise of a key in the program) keep their original values at the surviving
positions; noise of a key that is an argument is drawn anew. Positions of a parameter that the example's shapes leave
unread stay, as a longer sequence may read them.
"""

from prune_jax.graph.errors import UnknownPrimitiveError
from prune_jax.graph.exported import load_exported, save_exported
from prune_jax.graph.groups import Group, Groups, Member, dependency_groups
from prune_jax.graph.importance import squared_magnitude, unit_scores
from prune_jax.graph.plan import apply_plan
from prune_jax.graph.pruning import Pruned, prune, smaller_function
from prune_jax.graph.recovery import recover
from prune_jax.graph.regulariser import group_regulariser
from prune_jax.graph.schema import kept_shapes

__all__ = [
    "Group",
    "Groups",
    "Member",
    "Pruned",
    "UnknownPrimitiveError",
    "apply_plan",
    "dependency_groups",
    "group_regulariser",
    "kept_shapes",
    "load_exported",
    "prune",
    "recover",
    "save_exported",
    "smaller_function",
    "squared_magnitude",
    "unit_scores",
]
