"""Engines: who runs forward, backward and optimizer."""
