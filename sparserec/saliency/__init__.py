"""Scores of weights: pytrees shaped like the params, in units of loss.

A score says what the loss loses with a weight. Signs are kept: a negative score
predicts that the loss falls when the weight goes. `sparserec.select` turns scores
into a support by magnitude, `sparserec.structure.unit_scores` sums them over units.

- `magnitude`: half the squared weight (in its own unit);
- `taylor`: weight times gradient;
- `obd`: half the squared weight times its curvature;
- `obs`: the same after all others made up for the removal;
- `oba`: weight times curvature times all weights.
"""

from sparserec.saliency._oba import oba
from sparserec.saliency._scores import diagonal, magnitude, obd, obs, taylor

__all__ = ["diagonal", "magnitude", "oba", "obd", "obs", "taylor"]
