-- Documents, the chunks that they are cut into, and the chunks' vectors.
\if :{?api}
\else
\set api http://127.0.0.1:8099
\endif

CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE documents (
    id    int PRIMARY KEY,
    title text NOT NULL,
    body  text NOT NULL
);
CREATE TABLE chunks (
    id          int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    document_id int NOT NULL REFERENCES documents ON DELETE CASCADE,
    place       int NOT NULL,
    content     text NOT NULL,
    UNIQUE (document_id, place)
);
CREATE TABLE embeddings (
    chunk_id  int REFERENCES chunks ON DELETE CASCADE,
    model     text,
    of_text   text NOT NULL,          -- md5 of the text that the vector is of
    embedding vector(32) NOT NULL,     -- as many numbers as the model gives
    PRIMARY KEY (chunk_id, model)
);
CREATE INDEX ON embeddings USING hnsw (embedding vector_cosine_ops);

-- A text in pieces of so many words.
CREATE FUNCTION split_text(body text, words int) RETURNS TABLE (place int, content text)
LANGUAGE sql IMMUTABLE AS $$
    SELECT ((w.n - 1) / words)::int + 1, string_agg(w.word, ' ' ORDER BY w.n)
      FROM regexp_split_to_table(body, '\s+') WITH ORDINALITY AS w(word, n) GROUP BY 1
$$;

-- What has no vector of its present text.
CREATE VIEW stale_chunks AS
SELECT c.id, c.content
  FROM chunks c
  LEFT JOIN embeddings e ON e.chunk_id = c.id AND e.model = df.getvar('model') AND e.of_text = md5(c.content)
 WHERE e.chunk_id IS NULL;

\copy documents FROM 'documents.csv' WITH (FORMAT csv, HEADER)

-- What the workflow knows by name. The key is stored encrypted, and HTTP steps alone can use it.
SELECT df.setvar('api', :'api'), df.setvar('model', 'demo-32'), df.setvar('api_key', 'sk-demo', secret => true);
