"""Static web page that runs a trained model in the visitor's browser with ONNX Runtime Web, without a server."""

from .graphs import PRECISIONS, Graph, make_graph, share_weights
from .server import serve_folder
from .site import Site, build_site


__all__ = ["PRECISIONS", "Graph", "Site", "build_site", "make_graph", "serve_folder", "share_weights"]
