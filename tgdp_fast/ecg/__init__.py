"""Transfer of electrocardiogram models: from records to results."""
