"""Who is who on the demo's Hub."""

OWNER, ALICE, BOB, MALLORY = "demo", "alice", "bob", "mallory"
PEOPLE = (OWNER, ALICE, BOB, MALLORY)
DATASET = f"{OWNER}/python-stdlib"
MODEL = f"{OWNER}/nano"
