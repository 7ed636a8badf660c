"""What several rooms need, and nothing else. Import the module you need: `from tenfold.core import images`."""
