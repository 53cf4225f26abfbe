from sidestep.devices import *  # temporary: moved to sidestep/devices.py
