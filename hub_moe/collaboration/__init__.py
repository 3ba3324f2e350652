"""The flows of people who improve a model together: propose a patch, review it, merge it, trace it back."""
