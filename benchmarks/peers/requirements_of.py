"""Print what an installed package requires here, but for the packages named after it."""

import re
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

package, *without = sys.argv[1:]
for line in requires(package) or ():
    requirement = Requirement(line)
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    marker = requirement.marker
    if name not in without and (marker is None or marker.evaluate({"extra": ""})):
        print(f"{requirement.name}{requirement.specifier}")
