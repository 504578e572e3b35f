"""Where names become classes: three hooks, and a loader that no broken plug-in can break."""
