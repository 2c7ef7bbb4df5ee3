"""Web page that shows which patches of an image a model keeps, what it predicts and what that costs."""

from .. import _moved
from .page import launch_page, make_page
from .viewer import Viewer


__all__ = ["Viewer", "launch_page", "make_page"]

__getattr__ = _moved.names_of(__name__)
