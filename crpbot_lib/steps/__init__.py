"""One function a DAG task or CLI command: reads the lake, calls a module, writes the lake, returns a small JSON-able dict."""
