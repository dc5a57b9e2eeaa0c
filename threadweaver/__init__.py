"""ThreadWeaver: train and run language models that think in parallel threads."""

import os

# Idle threads of OpenMP spin for milliseconds by default, which beside one other process starves
# both: 120 responses of a small model took 4.5 times as long on two cores, and 1.3 times with
# threads that sleep at once, which costs little on a quiet machine. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
