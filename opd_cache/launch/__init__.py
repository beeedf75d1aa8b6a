"""How the stages are started: in this process, or each as its own command."""
