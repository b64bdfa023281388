import sys

from mobilenet_fast.cli import main

sys.exit(main())
