"""Runs a network and lets samples exit; knows no model class."""
