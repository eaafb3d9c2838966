"""ECG transfer: from two folders of records to guided samples and a report."""
