"""The simulation of the paper, which is also the demo, and the transfer of handwritten digits."""
