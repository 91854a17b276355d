"""The kit for method authors: every law that the package's own methods keep, for yours.

Nothing of it is loaded by ``import peft_any``. `check_method` needs no test tool;
`peft_any.testing.strategies` needs Hypothesis, and the fixtures need pytest.
"""

from peft_any.testing.case import Case as Case
from peft_any.testing.case import usual_sites as usual_sites
from peft_any.testing.checking import check_method as check_method
from peft_any.testing.closeness import assert_close as assert_close
from peft_any.testing.libraries import LIBRARIES as LIBRARIES
from peft_any.testing.libraries import Lib as Lib
from peft_any.testing.libraries import library as library
from peft_any.testing.libraries import missing as missing
from peft_any.testing.libraries import rows as rows
