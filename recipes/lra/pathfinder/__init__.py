"""Pathfinder images (Linsley et al. 2018, arXiv:1805.08315; Kim et al. 2020) with the sizes and numbers of the Long Range Arena release.

Two dashed paths of 14 paddles grow from two seeds near the middle; shorter distractors fill in. One marker lies on the tail of one path,
the other on the head of the same path (label 1) or of the other path (label 0). A path grows paddle by paddle: from the gap after the
last paddle, the next head lies on a circle, drawn with weight cos^2(continuity * turn), where no other paddle's surroundings lie.

At 32 pixels the pictures can hardly be told from the published generator's by their grey levels or their 3 x 3 patterns. That matters: an
earlier form drew more and fainter distractors, and no small Transformer left chance on it. So what looks like a slip there is kept: the
search for a seed's place fails for most directions (`Room.wanted`), which leaves about one distractor of five; distractors are brighter
than paths (2 to 1.5); straight paths lean near two of the edges (`step`); a path that runs into itself begins a new image.

What is ours:
- Every gap belongs to one path, and no marker covers two ends of paths, so that a label is never in doubt; nor do the markers touch each
  other. Of pictures at 32 pixels grown without these rules, one in eight breaks the first and one in twelve of the rest the last.
- At 64 and 128 pixels, where one beginning in 4,400 or in 120 ends well, a path first takes back its last paddles and tries again, up to
  30 times.
- Labels alternate, so each split whose size is even is balanced exactly.

Every image depends on (seed, its number) alone.
"""

from .picture import render
from .rules import RULES, Paddle, Rules, Scene
from .scene import make_scene

__all__ = ["RULES", "Paddle", "Rules", "Scene", "make_scene", "render"]
