r"""Inner data over several ranks: a pair of collectives whose derivatives of every order are right.

.. math:: \ell(\phi) = \sum_i \ell_i(\phi), \qquad \ell = summed(\ell_i(copied(\phi)))

Rank ``i`` holds the data of its own term. ``copied`` goes around what all ranks share, ``summed`` around what they
hold apart; the backward pass of each is the other, so gradients, products with second derivatives and hypergradients
are those of the problem in one process, on every rank.
"""

from diffopt.distributed.collectives import copied, summed

__all__ = ["copied", "summed"]
