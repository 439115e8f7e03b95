-- Cut the documents into chunks, get vectors for those that have none (or one of an older text), four chunks a call.
SELECT df.start(
  $$ INSERT INTO chunks (document_id, place, content)
     SELECT d.id, p.place, p.content FROM documents d CROSS JOIN split_text(d.body, 15) p
     ON CONFLICT (document_id, place) DO UPDATE SET content = excluded.content WHERE chunks.content <> excluded.content $$
  ~> $$ DELETE FROM chunks c USING documents d
        WHERE d.id = c.document_id AND c.place > (SELECT max(p.place) FROM split_text(d.body, 15) p) $$
  ~> df.loop(
    $$ SELECT array_agg(s.id ORDER BY s.id) AS ids, jsonb_agg(s.content ORDER BY s.id) AS texts
         FROM (SELECT id, content FROM stale_chunks ORDER BY id LIMIT 4) s HAVING count(*) > 0 $$ |=> 'batch'
    ~> df.if_rows('batch',
      df.http('{api}/v1/embeddings', 'POST', '{"model": "{model}", "input": $batch.texts}',
              '{"Authorization": "Bearer {api_key}"}') |=> 'answer'
      ~> ('SELECT $answer.ok'
          ?> $$ INSERT INTO embeddings (chunk_id, model, of_text, embedding)
                SELECT ($batch.ids)[n + 1], '{model}', md5($batch.texts ->> n), v::vector
                  FROM jsonb_to_recordset(($answer.body)::jsonb -> 'data') AS d(index int, embedding text)
                 CROSS JOIN LATERAL (SELECT d.index, d.embedding) AS of(n, v)
                ON CONFLICT (chunk_id, model) DO UPDATE SET of_text = excluded.of_text, embedding = excluded.embedding $$
          !> $$ DO $do$ BEGIN RAISE EXCEPTION 'the embedding service says %: %', $answer.status, $answer.body; END $do$ $$),
      df.break('"nothing left"'))),
  'embed-documents') AS id \gset

SELECT df.await_instance(:'id');
SELECT count(*) AS chunks, count(e.chunk_id) AS embedded FROM chunks c LEFT JOIN embeddings e ON e.chunk_id = c.id;
