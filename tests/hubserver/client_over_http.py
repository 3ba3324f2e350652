"""The Hub's wire protocol spoken by hand, for what the real client would never send or do."""

import base64
import hashlib
import json

import httpx2


class Client:
    """A few calls as `user`; answers are returned as they come."""

    broken = httpx2.TransportError

    def __init__(self, hub, user="alice"):
        self.hub = hub
        self.user = user
        self.client = httpx2.Client(timeout=60)
        self.headers = {"authorization": f"Bearer {hub.tokens[user]}"} if user else {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def send(self, method, path, **options):
        headers = self.headers | options.pop("headers", {})
        url = path if path.startswith("http") else self.hub.url + path
        return self.client.request(method, url, headers=headers, **options)

    def create(self, name, **fields):
        return self.send("POST", "/api/repos/create", json={"name": name, **fields})

    def commit(self, name, files, *, as_large=False, header=None, **query):
        lines = [{"key": "header", "value": {"summary": "m"} | (header or {})}]
        for path, content in files.items():
            if as_large:
                oid = self.upload(name, content)
                lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid}})
            else:
                text = base64.b64encode(content).decode()
                lines.append({"key": "file", "value": {"path": path, "content": text, "encoding": "base64"}})
        return self.commit_body(name, "\n".join(map(json.dumps, lines)).encode(), **query)

    def commit_body(self, name, body, **query):
        return self.send("POST", f"/api/models/{self.user}/{name}/commit/main", content=body, params=query)

    def propose_and_merge(self, name, files):
        """Open a pull request and merge it; the answer to the merge."""
        answer = self.commit(name, files, create_pr="1").raise_for_status()
        number = answer.json()["pullRequestUrl"].rpartition("/")[2]
        return self.send("POST", f"/api/models/{self.user}/{name}/discussions/{number}/merge", content=b"null")

    def upload(self, name, content, *, oid=None, size=None):
        oid, size = oid or hashlib.sha256(content).hexdigest(), len(content) if size is None else size
        actions = self.batch(name, oid, size).get("actions")
        if actions:
            self.put(actions["upload"], content, oid)
        return oid

    def batch(self, name, oid, size):
        body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [{"oid": oid, "size": size}]}
        answer = self.send("POST", f"/{self.user}/{name}.git/info/lfs/objects/batch", json=body)
        return answer.raise_for_status().json()["objects"][0]

    def put(self, action, content, oid):
        header = action.get("header")
        if not header:
            return self.client.put(action["href"], content=content).raise_for_status()
        step, parts = int(header["chunk_size"]), []
        for number in range(1, -(-len(content) // step) + 1):
            part = content[(number - 1) * step : number * step]
            etag = self.client.put(header[str(number)], content=part).raise_for_status().headers["etag"]
            parts.append({"partNumber": number, "etag": etag})
        return self.client.post(action["href"], json={"oid": oid, "parts": parts}).raise_for_status()
