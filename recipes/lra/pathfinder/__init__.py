"""Pathfinder images (Linsley et al. 2018, arXiv:1805.08315; Kim et al. 2020) with the sizes and numbers of the Long Range Arena release.

Two dashed paths of 14 paddles grow from two seeds near the middle; shorter distractors fill in. One marker lies on the tail of one path,
the other on the head of the same path (label 1) or of the other path (label 0). A path grows paddle by paddle: from the gap after the
last paddle, the next head lies on a circle, drawn with weight cos^2(continuity * turn), where no other paddle's surroundings lie.

What is taken from the published generator and what is ours:
- Paddles and markers are drawn as there: in black and white on pixels `antialias` times as fine, from whole pixels, then made smaller.
- A paddle's surroundings are its line widened by the margin. There they are grey levels; here two sets of pixels (`Boards`). A set is one
  Python integer, so a test for room is a shift and an "and", and a 32 x 32 image takes a few milliseconds.
- The search for a seed's place fails for most directions, as there (`Stencils.wanted`): at 32 pixels about one distractor of five is drawn,
  and with more of them the task is another one, at which small Transformers stay at chance.
- At 32 pixels the distractors are brighter than the paths (2 to 1.5), because the published generator multiplies the contrast of a
  snake by that of a paddle for the two paths alone. A distractor with no room for its full length is left out, as there.
- Ours alone: no pixel is covered by two contours, seeds and last paddles included, and every gap belongs to one of them, so that a label is
  never in doubt; nor do the markers touch each other.
- A path with no room to go on begins a new image, as there; at 64 and 128 pixels, where one beginning in 3000 or in 100 ends well, it
  first takes back its last paddles and tries again, up to 30 times.
- Labels alternate, so each split whose size is even is balanced exactly.

Every image depends on (seed, its number) alone.
"""

from .picture import render
from .rules import RULES, Paddle, Rules, Scene
from .scene import make_scene

__all__ = ["RULES", "Paddle", "Rules", "Scene", "make_scene", "render"]
