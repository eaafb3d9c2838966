"""One module for each kind of folder of electrocardiograms. All of them are imported when a folder is opened.

A module calls :func:`tgdp_fast.ecg.records.registry.reader` with the name of its kind, how a folder of this kind is
recognized, and a function that reads its tables and headers. Records that are no WFDB records bring a function for
their signals, by :func:`tgdp_fast.ecg.records.registry.signal_reader`. Nothing else has to change for a new data set.
"""
