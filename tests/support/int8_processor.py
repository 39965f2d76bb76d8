"""What tests of 8-bit products need of the processor."""

import pytest

from nmt.models import inference_int8 as int8

needs_vnni = pytest.mark.skipif(not int8.is_available(), reason="the processor multiplies no 8-bit integers")
