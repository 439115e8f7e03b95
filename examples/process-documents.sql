-- Batches in a loop: each document is processed once and logged once, whatever is killed meanwhile.
CREATE TABLE documents (id int PRIMARY KEY, body text, words int, processed boolean NOT NULL DEFAULT false);
CREATE TABLE document_log (document_id int, words int);
CREATE TABLE report (documents bigint, words bigint);
INSERT INTO documents (id, body) SELECT n, 'the body of document ' || n FROM generate_series(1, 1000) n;

SELECT df.start(
  df.loop(
    'SELECT id FROM documents WHERE NOT processed ORDER BY id LIMIT 100' |=> 'batch'
    ~> 'UPDATE documents SET words = length(to_tsvector(body)), processed = true WHERE id = ANY($batch)'
    ~> 'INSERT INTO document_log SELECT id, words FROM documents WHERE id = ANY($batch)',
    'SELECT EXISTS (SELECT FROM documents WHERE NOT processed)')
  ~> (('SELECT count(*) AS documents FROM document_log' |=> 'all')
      & ('SELECT sum(words) AS words FROM document_log' |=> 'sum'))
  ~> 'INSERT INTO report VALUES ($all.documents, $sum.words)',
  'process-documents') AS id \gset

SELECT df.await_instance(:'id');
SELECT df.explain(:'id');
TABLE report;
