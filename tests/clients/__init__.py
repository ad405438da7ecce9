"""Tests of tunings."""
