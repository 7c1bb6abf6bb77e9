"""Let `google` be found here too.

google-cloud-aiplatform 2.7 makes the package by a .pth file that knows its own folder alone; Colab
itself has `google.colab` in that folder.
"""

import sys
from pathlib import Path

if "google" in sys.modules:
    sys.modules["google"].__path__.append(str(Path(__file__).with_name("google")))
