"""tgis: a text-generation inference server.

The packages form floors; a module imports only from floors below it (docs/architecture.md).
"""

__version__ = "0.1.0"
