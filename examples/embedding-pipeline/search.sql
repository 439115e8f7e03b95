-- The chunks that are nearest to a question. `psql -v question='...' -f search.sql`
\if :{?question}
\else
\set question 'why does an update of a row have to wait'
\endif

SELECT df.start(
  df.as(df.sql(format('SELECT %L AS text', :'question')), 'question')
  ~> (df.http('{api}/v1/embeddings', 'POST', '{"model": "{model}", "input": ["$question.text"]}',
              '{"Authorization": "Bearer {api_key}"}') |=> 'answer')
  ~> $$ SELECT d.title, c.content
          FROM embeddings e JOIN chunks c ON c.id = e.chunk_id JOIN documents d ON d.id = c.document_id
         WHERE e.model = '{model}'
         ORDER BY e.embedding <=> (($answer.body)::jsonb #>> '{data,0,embedding}')::vector LIMIT 3 $$,
  'search') AS id \gset

SELECT df.await_instance(:'id');
SELECT hit ->> 'title' AS title, hit ->> 'content' AS content FROM jsonb_array_elements(df.result(:'id')::jsonb -> 'rows') hit;
