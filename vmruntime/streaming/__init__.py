"""The HTTP server behind the URLs of exec, attach and port-forward."""
