"""``scenes``: a generated benchmark whose questions need most of the picture. Needs Pillow and nothing else.

Several shapes with colour, size, place and overlap on a texture, and signs to read, at 112, 224 or 448 pixels. A
picture is a function of (split, size, seed, index) alone.
"""

from vlmeff.evaluation.scenes.balance import question_only_accuracy
from vlmeff.evaluation.scenes.benchmark import samples
from vlmeff.evaluation.scenes.composition import GEOMETRIES, Scene, compose
from vlmeff.evaluation.scenes.drawing import draw
from vlmeff.evaluation.scenes.questions import TYPES, Question, all_questions, ask, theme_question

__all__ = [
    "GEOMETRIES",
    "TYPES",
    "Question",
    "Scene",
    "all_questions",
    "ask",
    "compose",
    "draw",
    "question_only_accuracy",
    "samples",
    "theme_question",
]
