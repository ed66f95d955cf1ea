"""A scene in, a wireframe out. Knows no files, no optimizer."""

from perceiver.model import Perceiver, PerceiverConfig, Segments
from perceiver.published import load_published
from perceiver.scene import Scene, SceneBatch
from perceiver.wireframe import Wireframe

__all__ = ["Perceiver", "PerceiverConfig", "Scene", "SceneBatch", "Segments", "Wireframe", "load_published"]
