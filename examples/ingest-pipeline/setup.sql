-- Where files arrive (staging), what is taken from them (sales and its dimensions), and what is said of them.
CREATE TABLE staging (
    line     int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    file     text,
    order_id text, customer text, product text, quantity text, price text, sold_at text   -- as they come
);
CREATE TABLE rejects (line int PRIMARY KEY, file text NOT NULL, reason text NOT NULL);
CREATE TABLE clean (
    order_id int PRIMARY KEY,
    file     text NOT NULL,
    customer text NOT NULL, product text NOT NULL, quantity int NOT NULL, price numeric NOT NULL, sold_at timestamptz NOT NULL
);
CREATE TABLE customers (name text PRIMARY KEY, first_order timestamptz NOT NULL);
CREATE TABLE products (name text PRIMARY KEY, last_price numeric NOT NULL, price_at timestamptz NOT NULL);
CREATE TABLE sales (
    order_id int PRIMARY KEY,
    customer text NOT NULL REFERENCES customers, product text NOT NULL REFERENCES products,
    quantity int NOT NULL, price numeric NOT NULL, sold_at timestamptz NOT NULL,
    file     text NOT NULL
);
CREATE TABLE publications (file text PRIMARY KEY, lines bigint, rejected bigint, published bigint, at timestamptz DEFAULT now());

CREATE MATERIALIZED VIEW revenue AS
SELECT product, sum(quantity * price) AS revenue FROM sales GROUP BY product;
CREATE UNIQUE INDEX ON revenue (product);

-- Why a line can't be taken, or NULL.
CREATE FUNCTION fault(s staging) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN s.order_id !~ '^[0-9]{1,9}$' OR s.order_id IS NULL THEN 'no order number'
                WHEN s.customer IS NULL OR s.product IS NULL THEN 'customer or product is missing'
                WHEN s.quantity !~ '^[1-9][0-9]{0,5}$' OR s.quantity IS NULL THEN 'bad quantity'
                WHEN s.price !~ '^[0-9]{1,9}(\.[0-9]+)?$' OR s.price IS NULL THEN 'bad price'
                WHEN s.sold_at !~ '^\d{4}-\d\d-\d\d \d\d:\d\d$' OR s.sold_at IS NULL THEN 'bad time' END
$$;
